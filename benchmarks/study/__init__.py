"""The study of docs/study.md: many short runs on the controlled task, one table, and what follows from it."""
