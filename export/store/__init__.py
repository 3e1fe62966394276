"""What a repository is kept in: its catalogue, its drafts, its aliases, in folders and object stores."""
