"""What an application imports: declarations, routing, the session. Never starts a move."""
