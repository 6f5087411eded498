"""The study of docs/study.md: many short runs on the controlled task, their table, and the conclusions."""
