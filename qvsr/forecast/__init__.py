"""What a run will take, from its settings alone: clips, work, memory, disk."""
