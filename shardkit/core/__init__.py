"""Pure code: no I/O, no clock, no SQLAlchemy. Ring, topology, placement, the move table, errors."""
