"""Tells people what happened: events become notices, notices wait in an outbox on disk, a child process delivers them.

The daemon itself opens no connection for it: a slow or hostile receiver costs it nothing, and neither do the libraries
that know a hundred services.
"""
