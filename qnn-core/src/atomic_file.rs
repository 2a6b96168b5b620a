//! Files that appear as a whole or not at all.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

/// A temporary file beside `path`, which takes that name when it is committed. Dropped before, it leaves nothing.
#[derive(Debug)]
pub(crate) struct AtomicFile {
    path: PathBuf,
    temp: NamedTempFile,
}

impl AtomicFile {
    /// Creates the temporary file, with the rights that any new file gets. What is at `path` now may only be a regular file: a
    /// device or a pipe would lose its name.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        if std::fs::metadata(path).is_ok_and(|old| !old.is_file()) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "what is there is no regular file"));
        }
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

/// Writes a file in whole pieces of [`PIECE_BYTES`], each at a multiple of its size. A system that keeps a file in memory as
/// it was written can then map it in pages of that size, which costs a decode step less than small ones.
#[derive(Debug)]
pub struct PieceWriter<'a> {
    out: BufWriter<&'a File>,
    at_bytes: u64,
}

impl<'a> PieceWriter<'a> {
    /// Writes to `file`, which must be empty.
    pub(crate) fn new(file: &'a File) -> Self {
        Self { out: BufWriter::with_capacity(PIECE_BYTES, file), at_bytes: 0 }
    }
}

impl Write for PieceWriter<'_> {
    /// Takes what still fits the piece: a full buffer is written as a whole, and never together with what follows it.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = PIECE_BYTES - (self.at_bytes % PIECE_BYTES as u64) as usize;
        let n = bytes.len().min(room);
        self.out.write_all(&bytes[..n])?;
        self.at_bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl Seek for PieceWriter<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.at_bytes = self.out.seek(to)?;
        Ok(self.at_bytes)
    }
}

/// Writes `path` as a whole or not at all, with what `fill` writes; a device or a pipe gets it as it comes.
///
/// # Errors
/// What `fill` or the system says. `path` is then unchanged.
pub fn write(path: &Path, fill: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>) -> io::Result<()> {
    if std::fs::metadata(path).is_ok_and(|old| !old.is_file() && !old.is_dir()) {
        let special = File::options().write(true).open(path)?;
        let mut out = BufWriter::new(&special);
        fill(&mut out)?;
        return out.flush();
    }
    let new = AtomicFile::create(path)?;
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, new.file());
    fill(&mut out)?;
    out.flush()?;
    drop(out);
    new.commit()
}

/// The folder that `path` is in.
pub(crate) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Small writes (padding, tables) are gathered; blobs are larger than this and go straight through.
const BUFFER_BYTES: usize = 64 << 10;

/// The size of large pages on x86-64 and most others.
const PIECE_BYTES: usize = 2 << 20;

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    /// A file holds what was written, in order, whatever the lengths of the writes, and a seek goes where it says.
    #[test]
    fn pieces_hold_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pieces");
        let bytes: Vec<u8> = (0..2 * PIECE_BYTES + 777).map(|i| (i * 31 % 251) as u8).collect();
        let mut expected = bytes.clone();
        expected[5..8].copy_from_slice(b"abc");

        let file = File::create(&path).unwrap();
        let mut out = PieceWriter::new(&file);
        let (mut rest, mut lengths) = (&bytes[..], [1, PIECE_BYTES - 1, 3, 1000, PIECE_BYTES + 5].iter().cycle());
        while let Some(n) = lengths.next().filter(|_| !rest.is_empty()) {
            let (now, later) = rest.split_at(rest.len().min(*n));
            out.write_all(now).unwrap();
            rest = later;
        }
        out.seek(SeekFrom::Start(5)).unwrap();
        out.write_all(b"abc").unwrap();
        out.flush().unwrap();

        let mut found = Vec::new();
        File::open(&path).unwrap().read_to_end(&mut found).unwrap();
        assert!(found == expected, "{} bytes, need {}", found.len(), expected.len());
    }

    /// What is no regular file keeps its name.
    #[test]
    #[cfg(unix)]
    fn special_files_stay() {
        use std::os::unix::fs::FileTypeExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(AtomicFile::create(&path).is_err());
        assert!(write(&path, |out| out.write_all(b"x")).is_err());
        assert!(std::fs::metadata(&path).unwrap().file_type().is_socket());
        assert!(AtomicFile::create(folder.path()).is_err());
    }
}
