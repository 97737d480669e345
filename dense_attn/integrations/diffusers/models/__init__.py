"""The families of denoisers: how each is called, which tokens attend to which, and its attention
processors.
"""
