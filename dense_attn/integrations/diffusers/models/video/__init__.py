"""The kinds of denoisers of videos, a file each."""
