"""DomainDirectory, jobs and subscribers at work: the only place with concurrency."""
