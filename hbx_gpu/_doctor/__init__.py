"""`hbx-gpu doctor`: what a machine has for a loader, what is chosen on it, and what to install."""
