//! The words by which the processes of a job know each other.
//!
//! Apart, because it decides who is let in and should be read in one look.

use crate::distributed::error;
use candle_core::{bail, Result};
use std::io::Write;
use std::path::Path;

/// A secret in two halves: those who call show the first, rank 0 shows the second. So neither side learns
/// from the other what it would need to take the other's part.
#[derive(Clone)]
pub(super) struct Token(Vec<u8>);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

impl Token {
    pub const LONGEST: usize = 1024;
    const SHORTEST: usize = 32;

    pub fn new(words: &str) -> Result<Self> {
        if !(Self::SHORTEST..=Self::LONGEST).contains(&words.len()) {
            bail!(
                "tcp-group: the token has {} characters, expected {} to {} (`openssl rand -hex 32`)",
                words.len(),
                Self::SHORTEST,
                Self::LONGEST
            )
        }
        Ok(Self(words.as_bytes().to_vec()))
    }

    /// 256 bits of the operating system's randomness.
    pub fn random() -> Result<Self> {
        let mut bytes = [0u8; 32];
        getrandom::fill(&mut bytes).map_err(|e| error(format!("tcp-group: no random numbers: {e}")))?;
        Ok(Self(bytes.iter().flat_map(|byte| format!("{byte:02x}").into_bytes()).collect()))
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub fn callers(&self) -> &[u8] {
        &self.0[..self.0.len() / 2]
    }

    pub fn rank0s(&self) -> &[u8] {
        &self.0[self.0.len() / 2..]
    }
}

/// Whether the two are equal, in a time that depends on their lengths alone.
pub(super) fn equal(shown: &[u8], expected: &[u8]) -> bool {
    let differences = shown.iter().zip(expected).fold(0, |all, (a, b)| std::hint::black_box(all | (a ^ b)));
    shown.len() == expected.len() && differences == 0
}

/// Writes where rank 0 is and the token, for the owner of the file alone. The file must not exist.
pub(super) fn publish(path: &Path, address: &str, token: &Token) -> std::io::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let line = format!("{address} {}\n", String::from_utf8_lossy(token.bytes()));
    options.open(path)?.write_all(line.as_bytes())
}

/// What [`publish`] wrote, or none while it is not there in full.
pub(super) fn find(path: &Path) -> Result<Option<(String, Token)>> {
    let Ok(file) = std::fs::File::open(path) else { return Ok(None) };
    owners_alone(&file, path)?;
    let text = std::io::read_to_string(file).unwrap_or_default();
    // Complete once it ends with a newline.
    let Some((address, token)) = text.strip_suffix('\n').and_then(|line| line.split_once(' ')) else {
        return Ok(None);
    };
    Ok(Some((address.to_string(), Token::new(token)?)))
}

/// A file that others can read holds no secret, and one that others can write is not rank 0's word.
#[cfg(unix)]
fn owners_alone(file: &std::fs::File, path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let mode = file.metadata().map_or(0, |data| data.permissions().mode());
    if mode & 0o077 != 0 {
        bail!(
            "tcp-group: {} has mode {:o}, expected 600: the rendezvous is its owner's alone",
            path.display(),
            mode & 0o777
        )
    }
    Ok(())
}

#[cfg(not(unix))]
fn owners_alone(_: &std::fs::File, _: &Path) -> Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_long_random_and_not_shown() {
        assert!(Token::new("short").unwrap_err().to_string().contains("expected 32 to 1024"));
        let (one, other) = (Token::random().unwrap(), Token::random().unwrap());
        assert_ne!(one.bytes(), other.bytes());
        assert_eq!((one.bytes().len(), one.callers().len(), one.rank0s().len()), (64, 32, 32));
        assert_eq!(format!("{one:?}"), "Token(..)");
    }

    #[test]
    fn equal_is_equality() {
        assert!(equal(b"abc", b"abc") && equal(b"", b""));
        for other in [&b"abd"[..], b"bbc", b"ab", b"abcd", b""] {
            assert!(!equal(other, b"abc") && !equal(b"abc", other));
        }
    }

    #[cfg(unix)]
    #[test]
    fn the_file_is_its_owners() {
        use std::os::unix::fs::PermissionsExt;
        let path = std::env::temp_dir().join(format!("candle-norm-token-{}", std::process::id()));
        let token = Token::random().unwrap();
        assert!(find(&path).unwrap().is_none());
        publish(&path, "127.0.0.1:1", &token).unwrap();
        assert!(publish(&path, "127.0.0.1:2", &token).is_err());
        let mode = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let (address, found) = find(&path).unwrap().unwrap();
        assert_eq!((address.as_str(), found.bytes()), ("127.0.0.1:1", token.bytes()));
        mode(0o644);
        let error = find(&path).unwrap_err().to_string();
        std::fs::remove_file(&path).unwrap();
        assert!(error.contains("has mode 644, expected 600"), "{error}");
    }
}
