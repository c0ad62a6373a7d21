"""Jobs between the command line and the packages below: sections of a recipe in, a result out."""
