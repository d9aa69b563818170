"""Write and read feature files and export folders."""
