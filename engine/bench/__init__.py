"""The README's figures, each as a command: `jupiter bench NAME`. The last line printed is JSON."""
