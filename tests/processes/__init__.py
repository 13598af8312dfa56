"""Tests in which processes are the subject: real servers, holders and engines, real signals."""
