//! Writes a record to `--json PATH`: a file, or standard output for `-`.
//!
//! A path is checked before the run, so that a run of ten minutes does not end with a record that can't be written. A
//! file is replaced atomically, so that no reader finds half a record; only one that can't be replaced (a file mounted
//! into a container, or in a directory that is not writable) is overwritten. A record that still can't be written,
//! because the disk is full by then, is printed on standard error.

use std::fmt;
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, FcntlArg, OFlag, fcntl};
use nix::sys::stat::makedev;
use nix::unistd::{AccessFlags, Uid, faccessat};
use serde::Serialize;
use tempfile::NamedTempFile;

/// How long writing waits for the reader of a pipe.
const READER_WAIT: Duration = Duration::from_secs(2);
const READER_POLL: Duration = Duration::from_millis(10);

/// The size of a short run's record. A disk with less room counts as full.
const ROOM_BYTES: usize = 32 * 1024;

/// The maximum of symbolic links that are followed, as in the kernel.
const LINKS_MAX: usize = 40;

/// The bit of a directory's mode with which only owners of directory or file may replace files in it.
const STICKY: u32 = 0o1000;

/// Where a record is written.
///
/// ```
/// use c1000k_record::Output;
///
/// assert_eq!(Output::parse("-").unwrap(), Output::Stdout);
/// assert_eq!(Output::parse("run.json").unwrap(), Output::Path("run.json".into()));
/// assert!(Output::parse("").is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Standard output: `-` or `/dev/stdout` on the command line.
    Stdout,
    /// A file, which is replaced; or a pipe or device, which is written to.
    Path(PathBuf),
}

impl Output {
    /// Reads the argument of `--json`.
    ///
    /// # Errors
    /// The argument is empty.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "" => Err("the path is empty; name a file, or - for standard output".to_owned()),
            "-" => Ok(Self::Stdout),
            // As a path it would be the file behind it, which would be replaced, with the summary in the old one.
            "/dev/stdout" | "/dev/fd/1" | "/proc/self/fd/1" => Ok(Self::Stdout),
            path => Ok(Self::Path(path.into())),
        }
    }

    /// Whether writing may wait for a reader: it is not a file.
    #[must_use]
    pub fn may_wait(&self) -> bool {
        match self {
            Self::Stdout => true,
            Self::Path(path) => matches!(WriteMethod::of(path), Ok(WriteMethod::WriteThrough(_))),
        }
    }

    /// Checks whether [`write`](Self::write) can succeed later, without leaving anything behind.
    ///
    /// # Errors
    /// The path is a directory or a socket, is not writable, or its disk is full; or standard output was opened for
    /// reading only, or is a full device.
    pub fn check_writable(&self) -> Result<(), OutputError> {
        let checked = match self {
            Self::Stdout => check_stdout(),
            Self::Path(path) => WriteMethod::of(path).and_then(|method| match method {
                WriteMethod::Replace(file) => check_file(&file),
                WriteMethod::WriteThrough(file) => check_through(&file),
            }),
        };
        checked.map_err(|error| self.error(error))
    }

    /// Writes the record as one JSON object with a newline at its end.
    ///
    /// # Errors
    /// The file can't be created, written or renamed; or the pipe has no reader within two seconds, or its reader closes
    /// it before the record is complete.
    pub fn write<T: Serialize>(&self, record: &T) -> Result<(), OutputError> {
        let text = text_of(record).map_err(|error| self.error(error))?;
        let outcome = match self {
            Self::Stdout => check_stdout().and_then(|()| write_all(io::stdout().lock(), &text)),
            Self::Path(path) => WriteMethod::of(path).and_then(|method| match method {
                WriteMethod::Replace(file) => replace_or_overwrite(&file, &text),
                WriteMethod::WriteThrough(file) => write_all(open_through(&file)?, &text),
            }),
        };
        outcome.map_err(|error| self.error(error))
    }

    fn error(&self, source: io::Error) -> OutputError {
        OutputError { output: self.clone(), source }
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdout => f.write_str("standard output"),
            Self::Path(path) => write!(f, "{}", path.display()),
        }
    }
}

/// A record that can't be written; displayed in one line with the place, the reason and the remedy.
#[derive(Debug)]
pub struct OutputError {
    output: Output,
    source: io::Error,
}

impl OutputError {
    /// Prints the complete record on standard error instead, and waits for the reader; returns one line with the error.
    /// A log on standard error is to be flushed first.
    #[must_use]
    pub fn print_instead<T: Serialize>(&self, record: &T) -> String {
        let printed = text_of(record).and_then(|text| write_all(io::stderr().lock(), &text));
        match printed {
            Ok(()) => format!("{self}; it was printed on standard error instead"),
            Err(_) => self.to_string(),
        }
    }

    fn remedy(&self) -> &'static str {
        match (self.source.kind(), &self.output) {
            (io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded, _) => "; make room there",
            (io::ErrorKind::FileTooLarge, _) => "; raise `ulimit -f`",
            (_, Output::Stdout) => "; use a file with --json, or open standard output for writing",
            (_, Output::Path(_)) => {
                "; use a file with --json in a directory that exists and is writable"
            }
        }
    }
}

impl fmt::Display for OutputError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { output, source } = self;
        write!(f, "cannot write the record to {output}: {source}{}", self.remedy())
    }
}

impl std::error::Error for OutputError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// How a path is written.
enum WriteMethod {
    Replace(PathBuf),
    WriteThrough(PathBuf),
}

impl WriteMethod {
    fn of(path: &Path) -> io::Result<Self> {
        // `Path` ignores these endings, by which the kernel requires a directory.
        if [b"/".as_slice(), b"/."].iter().any(|end| path.as_os_str().as_bytes().ends_with(end)) {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        match fs::metadata(path) {
            Ok(found) if found.is_dir() => Err(io::ErrorKind::IsADirectory.into()),
            Ok(found) if found.file_type().is_socket() => Err(io::Error::other("it is a socket")),
            // A link is kept: its target is replaced.
            Ok(found) if found.is_file() => Ok(Self::Replace(path.canonicalize()?)),
            Ok(_) => Ok(Self::WriteThrough(path.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Ok(Self::Replace(end_of_links(path)?))
            }
            Err(error) => Err(error),
        }
    }
}

/// The target of symbolic links, which does not exist yet.
fn end_of_links(path: &Path) -> io::Result<PathBuf> {
    let mut end = path.to_owned();
    for _ in 0..LINKS_MAX {
        let Ok(next) = fs::read_link(&end) else { return Ok(end) };
        // Relative to the directory of the link, unless it is absolute.
        end = end.parent().unwrap_or(Path::new("")).join(next);
    }
    Err(Errno::ELOOP.into())
}

/// Whether standard output can be written.
///
/// # Errors
/// It is open for reading only, or a full device.
pub fn check_stdout() -> io::Result<()> {
    let (mode, file) = stdout_as_opened()?;
    match mode {
        OFlag::O_RDONLY => Err(io::Error::other("it is open for reading only")),
        _ if file.metadata()?.file_type().is_char_device() => check_device(file),
        _ => Ok(()),
    }
}

/// Whether standard output is `/dev/null`, open for reading and writing. A Rust program that is started without a
/// standard output gets that instead, and can't distinguish it from what its parent chose, such as Python's `DEVNULL`.
/// A shell's `>/dev/null` is open for writing only.
#[must_use]
pub fn stdout_may_be_closed() -> bool {
    let is_null = |(mode, file): (OFlag, File)| {
        let found = file.metadata().ok()?;
        let is_null = found.file_type().is_char_device() && found.rdev() == makedev(1, 3);
        Some(is_null && mode == OFlag::O_RDWR)
    };
    stdout_as_opened().ok().and_then(is_null).unwrap_or(false)
}

fn stdout_as_opened() -> io::Result<(OFlag, File)> {
    let stdout = io::stdout();
    let mode = OFlag::from_bits_retain(fcntl(&stdout, FcntlArg::F_GETFL)?) & OFlag::O_ACCMODE;
    Ok((mode, File::from(stdout.as_fd().try_clone_to_owned()?)))
}

/// A pipe is not opened: that would wait for its reader, and closing it again would end the reader's input.
fn check_through(path: &Path) -> io::Result<()> {
    if fs::metadata(path)?.file_type().is_fifo() {
        faccessat(AT_FDCWD, path, AccessFlags::W_OK, AtFlags::AT_EACCESS)?;
        return Ok(());
    }
    let flags = (OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits();
    check_device(File::options().write(true).custom_flags(flags).open(path)?)
}

/// Writes zero bytes, which also fails on a full device.
fn check_device(mut device: File) -> io::Result<()> {
    device.write(&[]).map(drop)
}

/// Whether the file can be replaced or, if it exists, be overwritten.
fn check_file(path: &Path) -> io::Result<()> {
    let replaced =
        temporary_beside(path).and_then(|file| file.as_file().write_all(&[0; ROOM_BYTES]));
    let overwritten = File::options().write(true).open(path);
    match (replaced, overwritten) {
        (Ok(()), Err(error)) if is_immutable(&error) || is_sticky(path) => Err(error),
        (Err(error), Ok(_)) if is_full(&error) => Err(error),
        (Ok(()), _) | (_, Ok(_)) => Ok(()),
        (Err(error), Err(_)) => Err(error),
    }
}

/// A file with `chattr +i` can't be replaced either.
fn is_immutable(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::EPERM as i32)
}

/// Whether the file exists and only the owners of file or directory may replace it, as in `/tmp`.
fn is_sticky(path: &Path) -> bool {
    let directory = fs::metadata(directory_of(path));
    let (Ok(file), Ok(directory)) = (fs::metadata(path), directory) else { return false };
    let user = Uid::effective().as_raw();
    directory.mode() & STICKY != 0 && user != file.uid() && user != directory.uid()
}

fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

/// One JSON object, followed by a newline.
fn text_of<T: Serialize>(record: &T) -> io::Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(record)?;
    text.push(b'\n');
    Ok(text)
}

/// Replaces a file atomically: a reader finds the old one or the new one. A link or a pipe is replaced, and not
/// followed or written to.
///
/// # Errors
/// The file can't be created, written or renamed; the old one is unchanged.
pub fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let file = temporary_beside(path)?;
    // Not by the methods of the temporary file, whose errors contain its name.
    file.as_file().write_all(text)?;
    file.persist(path)?;
    Ok(())
}

/// Replaces the file, or overwrites it if it can't be replaced for another reason than a full disk.
fn replace_or_overwrite(path: &Path, text: &[u8]) -> io::Result<()> {
    replace(path, text).or_else(|error| match File::options().write(true).open(path) {
        Ok(mut file) if !is_full(&error) => {
            file.set_len(0)?;
            file.write_all(text)
        }
        _ => Err(error),
    })
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A file in the same directory, because a file can't be renamed to another file system.
fn temporary_beside(path: &Path) -> io::Result<NamedTempFile> {
    if path.file_name().is_none() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    let directory = directory_of(path);
    fs::metadata(directory)?;
    // The mode of any new file, which the umask reduces, instead of 0600.
    tempfile::Builder::new()
        .prefix(".c1000k-")
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(directory)
        // Without the name of the temporary file, which would be confusing.
        .map_err(|error| error.kind().into())
}

/// Opens a pipe or a device. Opening a pipe waits for its reader, so it is first checked that there is one.
fn open_through(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.write(true);
    if !fs::metadata(path)?.file_type().is_fifo() {
        return options.open(path);
    }
    let deadline = Instant::now() + READER_WAIT;
    loop {
        let probe = options.clone().custom_flags(OFlag::O_NONBLOCK.bits()).open(path);
        match probe {
            Ok(_has_reader) => return options.open(path),
            Err(error) if error.raw_os_error() != Some(Errno::ENXIO as i32) => return Err(error),
            Err(_) if Instant::now() >= deadline => {
                return Err(io::Error::new(io::ErrorKind::NotConnected, "no one reads this pipe"));
            }
            Err(_) => thread::sleep(READER_POLL),
        }
    }
}

fn write_all(mut out: impl Write, text: &[u8]) -> io::Result<()> {
    out.write_all(text).and_then(|()| out.flush())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn to(path: &Path) -> Output {
        Output::parse(path.to_str().unwrap()).unwrap()
    }

    fn names(directory: &Path) -> Vec<String> {
        fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[test]
    fn checking_leaves_nothing_behind_and_writing_leaves_one_file() {
        let directory = tempfile::tempdir().unwrap();
        let output = to(&directory.path().join("run.json"));
        output.check_writable().unwrap();
        assert_eq!(names(directory.path()), Vec::<String>::new());

        output.write(&[1, 2]).unwrap();
        output.write(&[3]).unwrap();
        assert_eq!(names(directory.path()), ["run.json"]);
        assert_eq!(fs::read_to_string(directory.path().join("run.json")).unwrap(), "[\n  3\n]\n");
    }

    #[test]
    fn standard_output_has_more_names_than_one() {
        for name in ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"] {
            assert_eq!(Output::parse(name), Ok(Output::Stdout), "{name}");
        }
        assert_eq!(to(Path::new("./-")), Output::Path("./-".into()));
    }

    #[test]
    fn a_record_is_readable_as_any_new_file_is() {
        let directory = tempfile::tempdir().unwrap();
        let plain = directory.path().join("plain");
        fs::write(&plain, "").unwrap();
        let record = directory.path().join("run.json");
        to(&record).write(&1).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&record), mode(&plain));
    }

    #[test]
    fn a_missing_directory_and_a_directory_in_place_of_a_file_are_errors_of_one_line() {
        let directory = tempfile::tempdir().unwrap();
        for bad in [directory.path().join("none/run.json"), directory.path().to_owned()] {
            let error = to(&bad).check_writable().unwrap_err().to_string();
            assert!(error.contains(&format!("to {}:", bad.display())), "{error}");
            assert!(!error.contains(".c1000k-"), "{error}");
            assert_eq!(error.lines().count(), 1, "{error}");
            assert!(to(&bad).write(&1).is_err());
        }
    }

    #[test]
    fn a_link_stays_and_its_file_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let (file, link) = (directory.path().join("file"), directory.path().join("link"));
        fs::write(&file, "old").unwrap();
        symlink(&file, &link).unwrap();
        to(&link).write(&7).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(&file).unwrap(), "7\n");
    }

    #[test]
    fn a_link_that_leads_to_no_file_yet_stays_and_the_file_is_made() {
        let directory = tempfile::tempdir().unwrap();
        let [file, link, first] = ["file", "link", "first"].map(|name| directory.path().join(name));
        symlink("file", &link).unwrap();
        symlink(&link, &first).unwrap();
        to(&first).check_writable().unwrap();
        to(&first).write(&7).unwrap();
        assert!(
            [&link, &first].iter().all(|link| fs::symlink_metadata(link).unwrap().is_symlink())
        );
        assert_eq!(fs::read_to_string(&file).unwrap(), "7\n");
    }

    #[test]
    fn what_can_never_be_written_is_found_before() {
        let directory = tempfile::tempdir().unwrap();
        let [astray, round, socket] =
            ["astray", "round", "socket"].map(|name| directory.path().join(name));
        symlink("none/run.json", &astray).unwrap();
        symlink("round", &round).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let with_slash = directory.path().join("new/");
        for bad in [&astray, &round, &socket, &with_slash, Path::new("/dev/full")] {
            let error = to(bad).check_writable().expect_err(&bad.display().to_string());
            assert_eq!(error.to_string().lines().count(), 1, "{error}");
        }
        assert_eq!(names(directory.path()).len(), 3);
    }

    #[test]
    fn a_file_that_cannot_be_replaced_is_overwritten() {
        // The name of the process: no user can create a file beside it.
        let name = Path::new("/proc/self/comm");
        to(name).check_writable().unwrap();
        to(name).write(&7).unwrap();
        assert_eq!(fs::read_to_string(name).unwrap().trim_end(), "7");
        // In the directory of a run, which is untrusted, overwriting would be unsafe.
        assert!(replace(name, b"8").is_err());
        assert_eq!(fs::read_to_string(name).unwrap().trim_end(), "7");
    }

    #[test]
    fn replacing_follows_no_link_and_waits_for_no_pipe() {
        let directory = tempfile::tempdir().unwrap();
        let [victim, link, pipe] =
            ["victim", "link", "pipe"].map(|name| directory.path().join(name));
        fs::write(&victim, "precious").unwrap();
        symlink(&victim, &link).unwrap();
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [&link, &pipe] {
            replace(path, b"new").unwrap();
            assert!(fs::symlink_metadata(path).unwrap().is_file());
        }
        assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
    }

    #[test]
    fn a_device_is_written_to_and_not_replaced() {
        let null = to(Path::new("/dev/null"));
        null.check_writable().unwrap();
        null.write(&1).unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }

    #[test]
    fn a_pipe_is_written_to_and_without_a_reader_it_is_an_error_in_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let pipe = to(&path);
        pipe.check_writable().unwrap();
        assert!(pipe.may_wait() && !to(&directory.path().join("file")).may_wait());
        let began = Instant::now();
        let error = pipe.write(&1).unwrap_err().to_string();
        assert!(error.contains("no one reads this pipe") && error.lines().count() == 1, "{error}");
        assert!(began.elapsed() < READER_WAIT * 5);

        let reader = thread::spawn(move || fs::read_to_string(path).unwrap());
        pipe.write(&1).unwrap();
        assert_eq!(reader.join().unwrap(), "1\n");
    }

    #[test]
    fn a_record_whose_reader_went_away_is_an_error() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let error = write_all(writer, b"{}").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
