//! Small files of `/proc` and `/sys`: read whole, and parsed or `None`.

use std::{fs, path::Path};

/// The file's text, or `None` if it does not exist or can't be read.
pub(crate) fn read(path: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// The first number in the file.
pub(crate) fn read_number(path: impl AsRef<Path>) -> Option<u64> {
    numbers(&read(path)?)?.first().copied()
}

/// The numbers of a kernel setting such as `net.ipv4.tcp_mem`, on the machine with this root directory.
pub(crate) fn read_sysctl(root: &Path, name: &str) -> Option<Vec<u64>> {
    numbers(&read(root.join("proc/sys").join(name.replace('.', "/")))?)
}

/// Numbers separated by white space; `None` if a part is not a number.
pub(crate) fn numbers(text: &str) -> Option<Vec<u64>> {
    text.split_whitespace().map(|word| word.parse().ok()).collect()
}

/// The number behind `key` in a text of lines such as `inactive_file 4096`.
pub(crate) fn value_of(text: &str, key: &str) -> Option<u64> {
    let value = |line: &str| line.strip_prefix(key)?.strip_prefix([' ', '\t'])?.trim().parse().ok();
    text.lines().find_map(value)
}

/// The value of `key` in a text of lines such as `VmHWM:   2064 kB`, in bytes.
pub(crate) fn kilobytes_of(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}

/// The size of a page of memory, the unit of several kernel figures.
pub(crate) fn page_bytes() -> u64 {
    procfs::page_size()
}

#[cfg(test)]
pub(crate) mod tests {
    use {super::*, proptest::prelude::*};

    /// Damaged texts for a parser: a captured text, with a part of it replaced.
    pub(crate) fn damaged(captured: &'static str) -> impl Strategy<Value = String> {
        let part = (0..=captured.len(), 0..40_usize);
        let instead = prop_oneof!["[0-9]{0,25}", "[ \\t\\n:,/.-]{0,5}", ".{0,10}"];
        (part, instead).prop_map(move |((start, length), instead)| {
            let end = (start + length).min(captured.len());
            let (before, after) = (&captured.as_bytes()[..start], &captured.as_bytes()[end..]);
            let text = [before, instead.as_bytes(), after].concat();
            String::from_utf8_lossy(&text).into_owned()
        })
    }

    proptest! {
        #[test]
        fn damaged_numbers_break_nothing(text in damaged("VmHWM:\t 2064 kB\n4096\t131072\n")) {
            let _ = (numbers(&text), kilobytes_of(&text, "VmHWM"), value_of(&text, "VmHWM:"));
        }
    }

    #[test]
    fn numbers_are_read_or_refused_as_a_whole() {
        assert_eq!(numbers("4096\t131072 6291456\n"), Some(vec![4096, 131_072, 6_291_456]));
        assert_eq!(numbers(""), Some(vec![]));
        assert_eq!(numbers("12 apples"), None);
        assert_eq!(numbers("99999999999999999999999"), None);
        assert_eq!(numbers("-1"), None);
    }

    #[test]
    fn kilobytes_are_found_by_their_whole_key() {
        let text = "VmHWMx:\t 1 kB\nVmHWM:\t    2064 kB\n";
        assert_eq!(kilobytes_of(text, "VmHWM"), Some(2064 * 1024));
        assert_eq!(kilobytes_of(text, "VmRSS"), None);
        assert_eq!(kilobytes_of("VmHWM: many kB", "VmHWM"), None);
        assert_eq!(kilobytes_of("VmHWM: 18446744073709551615 kB", "VmHWM"), None);
    }

    #[test]
    fn a_value_is_found_by_its_whole_key() {
        let text = "active_file_x 1\nactive_file 2\nPPid:\t3\n";
        assert_eq!(value_of(text, "active_file"), Some(2));
        assert_eq!(value_of(text, "PPid:"), Some(3));
        assert_eq!(
            (value_of(text, "active"), value_of("active_file", "active_file")),
            (None, None)
        );
    }

    #[test]
    fn a_missing_file_is_none() {
        assert_eq!(read("/proc/no/such/file"), None);
        assert_eq!(read_number("/proc/no/such/file"), None);
    }
}
