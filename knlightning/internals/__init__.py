"""Private parts of other libraries, a module for each library.

Everything the package uses of a library that is not public stands here, with the release it was tried with. A test for
each part fails when a release changes it, and says what to do.
"""
