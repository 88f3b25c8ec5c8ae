"""Training of the student on stored responses and rewards."""
