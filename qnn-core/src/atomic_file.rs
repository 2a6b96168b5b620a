//! Files that appear as a whole or not at all.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, ErrorKind, Seek, SeekFrom, Write};
use std::path::{Component, Path, PathBuf};

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
            return Err(io::Error::new(ErrorKind::InvalidInput, "what is there is no regular file"));
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
    if is_special(path) {
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

/// Refuses outputs, each the option that names it and its path, that are one of `inputs` or another output: what is there would
/// be lost. However their paths are spelled, and also where the file is not there yet; a device or a pipe loses nothing.
///
/// # Errors
/// `InvalidInput` with both names and the path.
pub fn check_outputs(outputs: &[(&str, &Path)], inputs: &[(&str, &Path)]) -> io::Result<()> {
    let mut taken: HashMap<PathBuf, &str> = inputs.iter().map(|(name, path)| (place(path), *name)).collect();
    for (name, path) in outputs.iter().filter(|(_, path)| !is_special(path)) {
        if let Some(other) = taken.insert(place(path), name) {
            let why = format!("{name} {}: it is the file of {other} too, need another one", path.display());
            return Err(io::Error::new(ErrorKind::InvalidInput, why));
        }
    }
    Ok(())
}

/// Refuses a path where no file can be written, as far as that shows before the work whose result it is for: its folder, or the
/// nearest one above it that is there, has to take new files. Leaves nothing behind.
///
/// # Errors
/// What the system says, with the folder.
pub fn check_place(path: &Path) -> io::Result<()> {
    if is_special(path) {
        return Ok(());
    }
    let above = folder_of(path).ancestors().find(|folder| folder.exists());
    let folder = above.unwrap_or(Path::new("."));
    let refused = |why: io::Error| io::Error::new(why.kind(), format!("no new file in {}: {why}", folder.display()));
    tempfile::tempfile_in(folder).map(drop).map_err(refused)
}

/// Where `path` is, or will be: links and `..` are followed as far as there are files.
pub(crate) fn place(path: &Path) -> PathBuf {
    if let Ok(found) = path.canonicalize() {
        return found;
    }
    match path.components().next_back() {
        Some(Component::Normal(name)) => place(folder_of(path)).join(name),
        Some(Component::ParentDir) => place(folder_of(path)).parent().unwrap_or(Path::new("")).to_owned(),
        _ => path.to_owned(),
    }
}

/// A device, a pipe or a socket.
fn is_special(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|file| !file.is_file() && !file.is_dir())
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

    /// No file is taken for an output where it is an input, however it is spelled, and none that is not there yet for two
    /// outputs; other files, and devices, are left to the user.
    #[test]
    fn outputs_are_files_of_their_own() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir(at("sub")).unwrap();
        std::fs::write(at("model.dlc"), "x").unwrap();
        let check = |output: &str, input: &str| check_outputs(&[("--out", &at(output))], &[("--in", &at(input))]);
        for same in ["model.dlc", "./model.dlc", "sub/../model.dlc", "none/../model.dlc"] {
            let error = check(same, "model.dlc").unwrap_err().to_string();
            assert!(error.starts_with("--out ") && error.contains(same) && error.contains("--in too"), "{error}");
        }
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink(at("model.dlc"), at("link")).unwrap();
            assert!(check("link", "model.dlc").is_err() && check("model.dlc", "link").is_err());
            std::os::unix::fs::symlink(folder.path(), at("sub/home")).unwrap();
            assert!(check("sub/home/new", "new").is_err());
            let null = Path::new("/dev/null");
            assert!(check_outputs(&[("--out", null), ("--more", null)], &[("--in", null)]).is_ok());
        }
        assert!(check("sub/model.dlc", "model.dlc").is_ok() && check("new", "model.dlc").is_ok());
        let (a, b) = (at("none/new"), at("./none/new"));
        assert!(check_outputs(&[("--out", &a), ("--more", &b)], &[]).is_err());
        assert!(check_outputs(&[("--out", Path::new("new")), ("--more", Path::new("./new"))], &[]).is_err());
    }

    /// Work is not done for a file that cannot be written in the end, and asking leaves no file and no folder.
    #[test]
    fn a_place_is_tried_before_the_work() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for good in ["new", "none/deeper/new"] {
            check_place(&at(good)).unwrap();
        }
        check_place(Path::new("none/new")).unwrap();
        check_place(Path::new("new")).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        std::fs::write(at("file"), "x").unwrap();
        let error = check_place(&at("file/none/new")).unwrap_err().to_string();
        assert!(error.contains(&at("file").display().to_string()), "{error}");
        #[cfg(target_os = "linux")]
        assert!(check_place(Path::new("/proc/new")).is_err());
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
