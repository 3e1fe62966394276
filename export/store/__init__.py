"""What a repository is kept in, folders and object stores: how it is read, and how it changes whole or not at all."""
