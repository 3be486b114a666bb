"""What an operator runs: plans and the mover. Drives core.move over storage; never imports orm."""
