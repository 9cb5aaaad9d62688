"""What a run does when it falls ill while nobody looks. `health.py` is what the train loop talks to."""
