"""What happens on this machine: the doctor, metrics and their exporter, the watchdog, the rollout beside another backend."""
