"""Layout attention beside what a user would pick instead."""
