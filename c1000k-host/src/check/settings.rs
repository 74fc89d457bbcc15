//! The settings that a target needs, as lines of a drop-in.

use std::fmt;

/// One setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Setting {
    /// A setting of the kernel.
    Sysctl {
        /// The name that `sysctl` uses.
        name: &'static str,
        /// The minimum values, or a port range of at least this width; if the present value is too low, never lower
        /// than it.
        values: Vec<u64>,
        /// The present value is enough.
        is_enough: bool,
        /// Its purpose, as a comment.
        purpose: &'static str,
    },
    /// The hard `RLIMIT_NOFILE` of a login or a service.
    HardDescriptors(u64),
    /// A limit that no setting raises, as a clause.
    Impossible(String),
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sysctl { name, values, is_enough, purpose } => {
                let values: Vec<String> = values.iter().map(u64::to_string).collect();
                let mark = if *is_enough { "#" } else { "" };
                writeln!(f, "# {purpose}\n{mark}{name} = {}", values.join(" "))
            }
            // `*` is every user except root.
            Self::HardDescriptors(count) => {
                writeln!(
                    f,
                    "#limits.d: *    hard nofile {count}\n#limits.d: root hard nofile {count}"
                )
            }
            Self::Impossible(why) => writeln!(f, "#note: {why}"),
        }
    }
}

/// The settings as a drop-in of sysctl.d. Settings that are high enough, lines for limits.d and limits that no setting
/// raises are comments, without a space after the `#`.
pub fn render_settings(settings: &[Setting]) -> String {
    settings.iter().map(Setting::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_sysctl_does_not_accept_are_comments_without_a_space() {
        let sysctl = |values, is_enough| Setting::Sysctl {
            name: "net.ipv4.tcp_mem",
            values,
            is_enough,
            purpose: "pages",
        };
        let settings = [
            sysctl(vec![1, 2, 3], false),
            sysctl(vec![4], true),
            Setting::HardDescriptors(132),
            Setting::Impossible("too few".to_owned()),
        ];
        let expected = "# pages
net.ipv4.tcp_mem = 1 2 3
# pages
#net.ipv4.tcp_mem = 4
#limits.d: *    hard nofile 132
#limits.d: root hard nofile 132
#note: too few
";
        assert_eq!(render_settings(&settings), expected);
    }
}
