"""The main job on real data in one command: learn what the standard library's own documentation says."""
