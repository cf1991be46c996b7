"""What an atlas needs between ingests: repacking, snapshots, a summary."""
