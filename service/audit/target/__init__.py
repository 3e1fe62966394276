"""What an audit attacks: an engine in this process, or a model behind an endpoint."""
