"""A site whose requests record which event loops and threads their async code runs on."""
