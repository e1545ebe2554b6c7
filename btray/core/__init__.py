"""What everything stands on: errors, configs, logs, Ray itself, metrics."""
