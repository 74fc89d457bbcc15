//! Where `--json PATH` points: a file, or standard output for `-`.
//!
//! A path is checked before the run, because a run of ten minutes must not end in a record that
//! can't be written; and it is replaced whole, so that nobody ever reads half a record.

use std::fmt;
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use serde::Serialize;
use tempfile::NamedTempFile;

/// So long a pipe's reader may take to come, once the record is there.
const READER_WAIT: Duration = Duration::from_secs(2);
const READER_POLL: Duration = Duration::from_millis(10);

/// Where a record is written.
///
/// ```
/// use c1000k_report::Destination;
///
/// assert_eq!(Destination::parse("-").unwrap(), Destination::Stdout);
/// assert_eq!(Destination::parse("run.json").unwrap(), Destination::Path("run.json".into()));
/// assert!(Destination::parse("").is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// Standard output, `-` on the command line.
    Stdout,
    /// A file, replaced whole; or a pipe or device, written to as it is.
    Path(PathBuf),
}

impl Destination {
    /// Reads the argument of `--json`.
    ///
    /// # Errors
    /// The argument is empty.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "" => Err("the path is empty; name a file, or - for standard output".to_owned()),
            "-" => Ok(Self::Stdout),
            path => Ok(Self::Path(path.into())),
        }
    }

    /// Whether writing may have to wait for a reader: a pipe or a terminal, and no file.
    #[must_use]
    pub fn may_wait(&self) -> bool {
        match self {
            Self::Stdout => true,
            Self::Path(path) => matches!(Target::of(path), Ok(Target::WriteThrough(_))),
        }
    }

    /// Tells now whether [`write`](Self::write) could work later; leaves nothing behind.
    ///
    /// # Errors
    /// The path is a folder, or no file can be made beside it.
    pub fn check_writable(&self) -> Result<(), WriteError> {
        let Self::Path(path) = self else { return Ok(()) };
        let target = Target::of(path).and_then(|target| match target {
            Target::Replace(file) => temporary_beside(&file).map(drop),
            // Opening a pipe would wait for its reader.
            Target::WriteThrough(_) => Ok(()),
        });
        target.map_err(|error| self.error(error))
    }

    /// Writes the record as one JSON object with a newline at its end.
    ///
    /// A reader of standard output that has gone away is no error: nobody is left to be told.
    ///
    /// # Errors
    /// The system refused to make, write or rename the file; or nobody opened the pipe within two seconds.
    pub fn write<T: Serialize>(&self, record: &T) -> Result<(), WriteError> {
        let mut text =
            serde_json::to_vec_pretty(record).map_err(|error| self.error(error.into()))?;
        text.push(b'\n');
        let outcome = match self {
            Self::Stdout => pour(io::stdout().lock(), &text),
            Self::Path(path) => Target::of(path).and_then(|target| match target {
                Target::Replace(file) => replace(&file, &text),
                Target::WriteThrough(file) => pour(open_through(&file)?, &text),
            }),
        };
        outcome.map_err(|error| self.error(error))
    }

    fn error(&self, source: io::Error) -> WriteError {
        WriteError { destination: self.clone(), source }
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdout => f.write_str("standard output"),
            Self::Path(path) => write!(f, "{}", path.display()),
        }
    }
}

/// A record that can't be written, in one line that names the place, the reason and the remedy.
#[derive(Debug)]
pub struct WriteError {
    destination: Destination,
    source: io::Error,
}

impl fmt::Display for WriteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot write the record to {}: {}", self.destination, self.source)?;
        match self.destination {
            Destination::Stdout => Ok(()),
            Destination::Path(_) => {
                f.write_str("; give --json a file in a folder that exists and that you may write")
            }
        }
    }
}

impl std::error::Error for WriteError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// How a path is written to.
enum Target {
    Replace(PathBuf),
    WriteThrough(PathBuf),
}

impl Target {
    fn of(path: &Path) -> io::Result<Self> {
        match fs::metadata(path) {
            Ok(found) if found.is_dir() => Err(io::ErrorKind::IsADirectory.into()),
            // A link stays a link: what it points to is replaced.
            Ok(found) if found.is_file() => Ok(Self::Replace(path.canonicalize()?)),
            Ok(_) => Ok(Self::WriteThrough(path.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Ok(Self::Replace(path.to_owned()))
            }
            Err(error) => Err(error),
        }
    }
}

/// Puts a file in place whole: at each moment a reader finds the old one or the new one.
///
/// # Errors
/// The system refused to make, write or rename the file.
pub fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut file = temporary_beside(path)?;
    file.write_all(text)?;
    file.persist(path)?;
    Ok(())
}

/// A file in the same folder, because a rename can't leave its file system.
fn temporary_beside(path: &Path) -> io::Result<NamedTempFile> {
    if path.file_name().is_none() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::metadata(folder)?;
    // As any new file: what the umask leaves of it, not the 0600 of a secret.
    tempfile::Builder::new()
        .prefix(".c1000k-")
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(folder)
        // The name of the temporary file would only puzzle the reader of the message.
        .map_err(|error| error.kind().into())
}

/// Opens a pipe or a device. To open a pipe waits for its reader, so it is seen first that there is one.
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
                return Err(io::Error::new(io::ErrorKind::NotConnected, "nobody reads this pipe"));
            }
            Err(_) => thread::sleep(READER_POLL),
        }
    }
}

fn pour(mut out: impl Write, text: &[u8]) -> io::Result<()> {
    match out.write_all(text).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        outcome => outcome,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn to(path: &Path) -> Destination {
        Destination::parse(path.to_str().unwrap()).unwrap()
    }

    fn names(folder: &Path) -> Vec<String> {
        fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[test]
    fn checking_leaves_nothing_behind_and_writing_leaves_one_file() {
        let folder = tempfile::tempdir().unwrap();
        let destination = to(&folder.path().join("run.json"));
        destination.check_writable().unwrap();
        assert_eq!(names(folder.path()), Vec::<String>::new());

        destination.write(&[1, 2]).unwrap();
        destination.write(&[3]).unwrap();
        assert_eq!(names(folder.path()), ["run.json"]);
        assert_eq!(fs::read_to_string(folder.path().join("run.json")).unwrap(), "[\n  3\n]\n");
    }

    #[test]
    fn a_record_is_readable_as_any_new_file_is() {
        let folder = tempfile::tempdir().unwrap();
        let plain = folder.path().join("plain");
        fs::write(&plain, "").unwrap();
        let record = folder.path().join("run.json");
        to(&record).write(&1).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&record), mode(&plain));
    }

    #[test]
    fn a_missing_folder_and_a_folder_in_place_of_a_file_are_told_in_one_line() {
        let folder = tempfile::tempdir().unwrap();
        for bad in [folder.path().join("none/run.json"), folder.path().to_owned()] {
            let error = to(&bad).check_writable().unwrap_err().to_string();
            assert!(error.contains(&format!("to {}:", bad.display())), "{error}");
            assert!(!error.contains(".c1000k-"), "{error}");
            assert_eq!(error.lines().count(), 1, "{error}");
            assert!(to(&bad).write(&1).is_err());
        }
    }

    #[test]
    fn a_link_stays_and_its_file_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        fs::write(&file, "old").unwrap();
        symlink(&file, &link).unwrap();
        to(&link).write(&7).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(&file).unwrap(), "7\n");
    }

    #[test]
    fn a_device_is_written_to_and_not_replaced() {
        let null = to(Path::new("/dev/null"));
        null.check_writable().unwrap();
        null.write(&1).unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }

    #[test]
    fn a_pipe_is_written_to_and_without_a_reader_it_is_an_error_in_good_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let pipe = to(&path);
        pipe.check_writable().unwrap();
        assert!(pipe.may_wait() && !to(&folder.path().join("file")).may_wait());
        let began = Instant::now();
        let error = pipe.write(&1).unwrap_err().to_string();
        assert!(error.contains("nobody reads this pipe") && error.lines().count() == 1, "{error}");
        assert!(began.elapsed() < READER_WAIT * 5);

        let reader = thread::spawn(move || fs::read_to_string(path).unwrap());
        pipe.write(&1).unwrap();
        assert_eq!(reader.join().unwrap(), "1\n");
    }

    #[test]
    fn a_reader_that_went_away_is_no_error() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        pour(writer, b"{}").unwrap();
    }
}
