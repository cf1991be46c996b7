"""Part of the double of cupy: as much as packages import that know cupy."""
