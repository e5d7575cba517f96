"""Tests in a real browser. A package, so that its conftest and test files may share names with those above."""
