"""The parts of report.py's page: its HTML, its pictures, and what they show of LoRA."""
