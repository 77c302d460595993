-- A file system gives the number of a file that was deleted to a new one. So a mark also says when its file was made
-- (statx(2), stx_btime; ns since 1970), and NULL where nobody could tell.
ALTER TABLE invalid_marks ADD COLUMN born INTEGER;
