"""Read and write the directories of runs, and locate them. Nothing here imports torch."""
