-- As for marks (schema 7): a number that a file system has given again is no use of the new file.
ALTER TABLE image_uses ADD COLUMN born INTEGER;
