-- No question that is asked again and again may read all jobs: a journal holds a million of them.

CREATE INDEX jobs_active ON jobs (seq) WHERE ended = 0;
CREATE INDEX jobs_by_domain ON jobs (domain, seq);
CREATE INDEX jobs_by_state ON jobs (state, seq);
CREATE INDEX jobs_by_disk_name ON jobs (disk, seq);

-- The few that are told to whoever asks for another merge of the disk.
CREATE INDEX jobs_modified ON jobs (domain, disk, seq)
WHERE ended = 1 AND (data_state = 'base-modified' OR (state = 'completed' AND intent = 'keep'));
