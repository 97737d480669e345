"""A text-to-image model small enough to ship, on scenes simple enough that success is counted."""
