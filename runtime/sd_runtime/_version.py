"""The version, apart from the package so that its modules can say it without importing the package's names."""

__version__ = "0.2.0.dev0"
