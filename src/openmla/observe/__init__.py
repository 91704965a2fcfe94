"""What happens on this machine: the doctor, and counters."""
