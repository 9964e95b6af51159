"""The command lines: flags and files in, pictures and reports out.  Nothing below imports anything from here."""
