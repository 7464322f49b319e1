"""What happens when something goes wrong: every test injects a fault into a run of a few seconds."""
