//! Reads the files of a run. They are untrusted: only regular files are read, and only up to a bound.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::OFlag;

/// A record with two series of 3,600 points has about 2 MB.
pub(crate) const RECORD_BYTES_MAX: u64 = 64 << 20;

/// `slabinfo`, the longest of the texts, has about 30 kB.
pub(crate) const TEXT_BYTES_MAX: u64 = 4 << 20;

/// The content of a regular file.
///
/// # Errors
/// The file can't be read, is not a regular file, or is longer than `bytes_max`.
pub fn read(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    // Checked before it is opened, because opening a device can have an effect.
    check_regular(&fs::metadata(path)?)?;
    // It may have been replaced since, and opening a pipe would wait for its writer.
    let flags = (OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits();
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    check_regular(&file.metadata()?)?;
    let mut bytes = Vec::new();
    let length = file.take(bytes_max + 1).read_to_end(&mut bytes)? as u64;
    if length > bytes_max {
        return Err(io::Error::other(format!("it is longer than {bytes_max} bytes")));
    }
    Ok(bytes)
}

/// The text of such a file; `None` if it can't be read. Invalid UTF-8 is replaced.
#[must_use]
pub fn text(path: &Path) -> Option<String> {
    let bytes = read(path, TEXT_BYTES_MAX).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

fn check_regular(found: &fs::Metadata) -> io::Result<()> {
    if found.is_file() { Ok(()) } else { Err(io::Error::other("it is not a regular file")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_regular_file_is_read_up_to_its_bound() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("text");
        fs::write(&path, b"seven\xff.").unwrap();
        assert_eq!(read(&path, 7).unwrap(), b"seven\xff.");
        assert!(read(&path, 6).unwrap_err().to_string().contains("longer than 6 bytes"));
        assert_eq!(text(&path).as_deref(), Some("seven\u{fffd}."));
    }

    #[test]
    fn a_pipe_a_device_and_a_directory_are_refused_without_a_wait() {
        let directory = tempfile::tempdir().unwrap();
        let pipe = directory.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [pipe.as_path(), Path::new("/dev/zero"), directory.path()] {
            let error = read(path, TEXT_BYTES_MAX).unwrap_err().to_string();
            assert!(error.contains("not a regular file"), "{}: {error}", path.display());
            assert_eq!(text(path), None);
        }
    }
}
