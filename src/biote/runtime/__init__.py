"""What a checkpoint needs in order to run. These files ship, flat, inside every export."""
