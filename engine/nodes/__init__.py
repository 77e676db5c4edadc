"""Several machines as one engine: the first one's hub, the others' agents, what passes between."""
