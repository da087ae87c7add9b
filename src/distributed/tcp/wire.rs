//! Messages over a stream: framed, bounded, checked, each with a time by which it has to be done.
//!
//! Apart from the group, because nothing here knows of ranks. What arrives is believed only if it says
//! what it is, is no longer than the reader needs, and arrived whole: a peer that is broken, or that is
//! something else altogether, can neither be mistaken for a rank nor make the reader allocate or wait.

use crate::distributed::Deadline;
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::net::TcpStream;

/// What opens every message.
pub(super) const MAGIC: u64 = 0x6361_6e6e_6f72_6d02;

/// Longest words of a call that travel; their digest covers all of them.
pub(super) const WORDS: usize = 4096;

/// Longest words of an answer: those of every rank, when they differ.
const ANSWER_WORDS: usize = 1 << 16;

/// Payloads up to here travel with their call: the statistics of 5000 channels. Longer ones wait until
/// all ranks are known to make the same call, so that what a call may bring is known before it is read.
pub(super) const INLINE: usize = 1 << 16;

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Tag {
    /// A rank to rank 0: I make this call.
    Call = 1,
    /// A rank to rank 0: what I bring to it.
    Payload,
    /// Rank 0: all make the same call, send what you bring.
    More,
    /// Rank 0: the result.
    Done,
    /// Rank 0: no result, in words; the group works on.
    Refused,
    /// Rank 0: no result, in words, now or later.
    Broken,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub tag: Tag,
    /// Number of the call it belongs to.
    pub call: u64,
    /// Of the words in full.
    pub digest: u64,
    pub words: Vec<u8>,
    pub payload: Vec<u8>,
}

impl Message {
    pub fn new(tag: Tag, call: u64) -> Self {
        Self { tag, call, digest: 0, words: vec![], payload: vec![] }
    }

    /// With words, cut to what a message may hold.
    pub fn words(mut self, words: &str) -> Self {
        let limit = if self.tag == Tag::Call { WORDS } else { ANSWER_WORDS };
        self.words = words.as_bytes()[..words.len().min(limit)].to_vec();
        self.digest = crate::distributed::digest(words.as_bytes());
        self
    }

    pub fn payload(mut self, payload: Vec<u8>) -> Self {
        self.payload = payload;
        self
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.words).into_owned()
    }

    fn header(&self) -> [u64; 6] {
        let lengths = [self.words.len() as u64, self.payload.len() as u64];
        [MAGIC, self.tag as u64, self.call, self.digest, lengths[0], lengths[1]]
    }
}

/// Bytes of a header: six numbers and the checksum.
const HEADER: usize = 7 * 8;

/// A stream on which nothing takes longer than the caller allows.
#[derive(Debug)]
pub(super) struct Channel(TcpStream);

impl Channel {
    pub fn new(stream: TcpStream) -> Result<Self> {
        stream.set_nonblocking(false)?;
        // Small messages that wait for each other: never hold one back.
        stream.set_nodelay(true)?;
        Ok(Self(stream))
    }

    pub fn stream(&self) -> &TcpStream {
        &self.0
    }

    /// No more from this side; what was sent still arrives, which closing outright does not promise.
    pub fn end(&self) {
        // Fails where the peer is gone already.
        let _ = self.0.shutdown(std::net::Shutdown::Write);
    }

    pub fn send(&mut self, message: &Message, by: Deadline) -> Result<()> {
        let header = message.header();
        let sum = checksum(&header, [&message.words, &message.payload]);
        let mut bytes = Vec::with_capacity(HEADER + message.words.len());
        header.iter().chain([&sum]).for_each(|number| bytes.extend(number.to_le_bytes()));
        bytes.extend(&message.words);
        if message.payload.len() > INLINE {
            self.write(&bytes, by)?;
            return self.write(&message.payload, by);
        }
        bytes.extend(&message.payload);
        self.write(&bytes, by)
    }

    /// The next message, if its payload has at most `longest` bytes.
    pub fn receive(&mut self, longest: usize, by: Deadline) -> Result<Message> {
        let mut bytes = [0; HEADER];
        self.read(&mut bytes, by)?;
        let mut numbers = bytes.chunks_exact(8).map(number);
        let header: [u64; 6] = std::array::from_fn(|_| numbers.next().unwrap_or_default());
        let [magic, tag, call, digest, words, payload] = header;
        let Some(tag) = self::tag(tag).filter(|_| magic == MAGIC) else {
            return Err(garbage("no message of this protocol".into()));
        };
        if words > ANSWER_WORDS as u64 || payload > longest as u64 {
            return Err(garbage(format!(
                "a message of {words} and {payload} bytes, expected at most {ANSWER_WORDS} and {longest}"
            )));
        }
        let (mut words, mut payload) = (vec![0; words as usize], vec![0; payload as usize]);
        self.read(&mut words, by)?;
        self.read(&mut payload, by)?;
        if numbers.next() != Some(checksum(&header, [&words, &payload])) {
            return Err(garbage("a message whose checksum is wrong".into()));
        }
        Ok(Message { tag, call, digest, words, payload })
    }

    pub fn write(&mut self, mut bytes: &[u8], by: Deadline) -> Result<()> {
        while !bytes.is_empty() {
            self.0.set_write_timeout(by.for_socket()?)?;
            match self.0.write(bytes) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => bytes = &bytes[n..],
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Fills `bytes`. The time counts for all of them: a peer that sends one now and then does not hold up.
    pub fn read(&mut self, mut bytes: &mut [u8], by: Deadline) -> Result<()> {
        while !bytes.is_empty() {
            self.0.set_read_timeout(by.for_socket()?)?;
            match self.0.read(bytes) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => bytes = &mut bytes[n..],
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

fn tag(number: u64) -> Option<Tag> {
    use Tag::*;
    [Call, Payload, More, Done, Refused, Broken].into_iter().find(|tag| *tag as u64 == number)
}

pub(super) fn garbage(what: String) -> Error {
    Error::new(ErrorKind::InvalidData, what)
}

/// Eight bytes, or fewer and zeros, as a number.
pub(super) fn number(bytes: &[u8]) -> u64 {
    let mut eight = [0; 8];
    eight[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(eight)
}

/// Of the header and what follows it, eight bytes at a time: against accidents, not against attackers.
fn checksum(header: &[u64], parts: [&[u8]; 2]) -> u64 {
    let mix = |sum: u64, number: u64| {
        let sum = (sum ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        sum ^ (sum >> 29)
    };
    let sum = header.iter().fold(0, |sum, number| mix(sum, *number));
    parts.iter().fold(sum, |sum, part| part.chunks(8).fold(sum, |sum, bytes| mix(sum, number(bytes))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::time::{Duration, Instant};

    fn pair() -> (Channel, Channel) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (Channel::new(one).unwrap(), Channel::new(listener.accept().unwrap().0).unwrap())
    }

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(20))
    }

    #[test]
    fn messages_arrive_as_they_were_sent() {
        let (mut one, mut other) = pair();
        for (words, payload) in [("", vec![]), ("sum of F32 [3]: x", vec![1, 2, 3]), ("", vec![7; INLINE])] {
            let message = Message::new(Tag::Call, 5).words(words).payload(payload);
            one.send(&message, soon()).unwrap();
            assert_eq!(other.receive(INLINE, soon()).unwrap(), message);
        }
    }

    /// Every bit of a message, turned over: refused, or waited for no longer than said.
    #[test]
    fn no_turned_bit_is_believed() {
        let message = Message::new(Tag::Done, 5).words("words").payload(vec![1, 2, 3]);
        let mut bytes = vec![];
        let header = message.header();
        let sum = checksum(&header, [&message.words, &message.payload]);
        header.iter().chain([&sum]).for_each(|number| bytes.extend(number.to_le_bytes()));
        bytes.extend(message.words.iter().chain(&message.payload));
        for bit in 0..8 * bytes.len() {
            let (mut one, mut other) = pair();
            let mut turned = bytes.clone();
            turned[bit / 8] ^= 1 << (bit % 8);
            one.write(&turned, soon()).unwrap();
            let start = Instant::now();
            let heard = other.receive(16, Deadline::after(Duration::from_millis(30)));
            assert!(heard.is_err(), "bit {bit} gave {heard:?}");
            assert!(start.elapsed() < Duration::from_secs(5), "bit {bit}");
        }
    }

    /// A length is checked before memory is taken for it, and bytes that trickle do not extend the time.
    #[test]
    fn neither_lengths_nor_trickles_are_trusted() {
        let (mut one, mut other) = pair();
        let header = [MAGIC, Tag::Done as u64, 0, 0, 0, 1 << 60, 0];
        let bytes: Vec<u8> = header.iter().flat_map(|number| number.to_le_bytes()).collect();
        one.write(&bytes, soon()).unwrap();
        let error = other.receive(1 << 20, soon()).unwrap_err();
        assert!(error.to_string().contains("expected at most 65536 and 1048576"), "{error}");

        let start = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for byte in &bytes[..40] {
                    std::thread::sleep(Duration::from_millis(20));
                    let _ = one.write(&[*byte], soon());
                }
            });
            let heard = other.receive(16, Deadline::after(Duration::from_millis(100)));
            assert!(matches!(heard.unwrap_err().kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut));
            assert!(start.elapsed() < Duration::from_millis(700), "{:?}", start.elapsed());
        });
    }
}
