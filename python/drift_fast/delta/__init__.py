"""The reasoning delta: computed, written, opened, combined and summarized."""
