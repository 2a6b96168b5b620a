//! Files that appear as a whole or not at all.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

/// A temporary file beside `path`, which takes that name when it is committed. Dropped before, it leaves nothing.
#[derive(Debug)]
pub(crate) struct AtomicFile {
    path: PathBuf,
    temp: NamedTempFile,
}

impl AtomicFile {
    /// Creates the temporary file, with the rights that any new file gets.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(".genie-").suffix(".tmp");
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        Ok(Self { path: path.to_owned(), temp: builder.tempfile_in(folder_of(path))? })
    }

    /// The file to fill.
    pub(crate) fn file(&self) -> &File {
        self.temp.as_file()
    }

    /// Brings the content to the disk, then gives the file its name.
    pub(crate) fn commit(self) -> io::Result<()> {
        self.temp.as_file().sync_all()?;
        self.temp.persist(&self.path).map_err(|error| error.error)?;
        // The new name is durable once the folder is; systems without such a call keep it durable themselves.
        if let Ok(folder) = File::open(folder_of(&self.path)) {
            let _ = folder.sync_all();
        }
        Ok(())
    }
}

/// Writes `path` as a whole or not at all, with what `fill` writes.
pub(crate) fn write(path: &Path, fill: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>) -> io::Result<()> {
    let new = AtomicFile::create(path)?;
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, new.file());
    fill(&mut out)?;
    out.flush()?;
    drop(out);
    new.commit()
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Small writes (padding, tables) are gathered; blobs are larger than this and go straight through.
pub(crate) const BUFFER_BYTES: usize = 64 << 10;
