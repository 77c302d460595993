-- What QEMU had open as raw is raw when its domain is off, whatever the guest has written to its first sector.
ALTER TABLE image_uses ADD COLUMN format TEXT;
