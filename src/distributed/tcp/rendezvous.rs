//! How the ranks of a job find rank 0 and it finds them, whoever else may knock.
//!
//! Apart from the collectives, because here a connection may be anybody's. Rank 0 reads from all of them
//! at once and waits for none: one that says nothing holds up nobody. Only who shows the job's token is
//! listened to, and rank 0 shows its part of it once all are there.

use super::token::{equal, Token};
use super::wire::{number, Channel, Message, Tag, MAGIC};
use crate::distributed::{error, Deadline};
use candle_core::{bail, Result};
use std::io::{ErrorKind, Read};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::time::Duration;

/// Between two looks at who has come.
const PAUSE: Duration = Duration::from_millis(2);

/// Connections that have not said who they are; beyond this the one that has been silent longest goes.
const SILENT: usize = 256;

/// Numbers before the token: magic, rank, world size, length of the token, and a checksum of these.
const HELLO: usize = 5 * 8;

fn hello(rank: usize, world_size: usize, token: &[u8]) -> Vec<u8> {
    let numbers = [MAGIC, rank as u64, world_size as u64, token.len() as u64];
    let mut bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    bytes.extend(crate::distributed::digest(&bytes).to_le_bytes());
    bytes.extend(token);
    bytes
}

/// A connection that has not said all it has to.
struct Guest {
    stream: TcpStream,
    heard: Vec<u8>,
}

/// What a guest turned out to be.
enum Heard {
    /// Not enough yet.
    Silence,
    /// Nobody of this job, or gone.
    Stranger,
    Rank(u64, u64),
}

impl Guest {
    fn listen(&mut self, token: &Token) -> Heard {
        // Never more than a greeting, so that what follows it stays for the group.
        let missing = |heard: &[u8]| match heard.get(24..32).map(number) {
            Some(length) if heard.len() >= HELLO => HELLO + length as usize - heard.len(),
            _ => HELLO - heard.len(),
        };
        let mut buffer = [0; HELLO + Token::LONGEST];
        loop {
            if self.heard.len() >= 8 && number(&self.heard[..8]) != MAGIC {
                return Heard::Stranger;
            }
            if self.heard.len() >= HELLO {
                let sum = number(&self.heard[32..40]) == crate::distributed::digest(&self.heard[..32]);
                if !sum || number(&self.heard[24..32]) > Token::LONGEST as u64 {
                    return Heard::Stranger;
                }
            }
            let wanted = missing(&self.heard);
            if wanted == 0 {
                return self.greeted(token);
            }
            match self.stream.read(&mut buffer[..wanted]) {
                Ok(0) => return Heard::Stranger,
                Ok(n) => self.heard.extend(&buffer[..n]),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Heard::Silence,
                Err(_) => return Heard::Stranger,
            }
        }
    }

    fn greeted(&mut self, token: &Token) -> Heard {
        if equal(&self.heard[HELLO..], token.callers()) {
            return Heard::Rank(number(&self.heard[8..16]), number(&self.heard[16..24]));
        }
        Heard::Stranger
    }
}

/// Rank 0's side: who has come, and who only came by.
struct Door<'a> {
    token: &'a Token,
    guests: Vec<Guest>,
    members: Vec<Option<TcpStream>>,
    strangers: usize,
}

impl Door<'_> {
    /// Takes in who knocks now. An error where the ranks of the job contradict each other.
    fn look(&mut self, listener: &TcpListener) -> std::result::Result<(), String> {
        while let Ok((stream, _)) = listener.accept() {
            if stream.set_nonblocking(true).is_ok() {
                self.guests.push(Guest { stream, heard: vec![] });
            }
            if self.guests.len() > SILENT + self.members.len() {
                self.guests.remove(0);
                self.strangers += 1;
            }
        }
        let mut i = 0;
        while i < self.guests.len() {
            let heard = self.guests[i].listen(self.token);
            if matches!(heard, Heard::Silence) {
                i += 1;
                continue;
            }
            let guest = self.guests.remove(i);
            match heard {
                Heard::Rank(rank, size) => self.admit(guest.stream, rank, size)?,
                _ => self.strangers += 1,
            }
        }
        self.still_there()
    }

    fn admit(&mut self, stream: TcpStream, rank: u64, size: u64) -> std::result::Result<(), String> {
        let ranks = self.members.len() + 1;
        let place = rank.checked_sub(1).and_then(|i| self.members.get_mut(usize::try_from(i).ok()?));
        match place {
            Some(place @ None) if size == ranks as u64 => *place = Some(stream),
            _ => {
                let reason = format!(
                    "tcp-group: got a call of rank {rank} of {size}, expected each rank of {ranks} once"
                );
                tell(stream, &reason);
                return Err(reason);
            }
        }
        Ok(())
    }

    /// A member says nothing until it is welcomed: an end of its stream means that it is gone.
    fn still_there(&self) -> std::result::Result<(), String> {
        for (i, stream) in self.members.iter().enumerate() {
            let Some(stream) = stream else { continue };
            match stream.peek(&mut [0]) {
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                _ => return Err(format!("tcp-group: rank {} left before all had come", i + 1)),
            }
        }
        Ok(())
    }

    fn waited(&self, timeout: Duration) -> String {
        let absent = self.members.iter().position(Option::is_none).map_or(0, |i| i + 1);
        let mut reason = format!("tcp-group: waited {timeout:?} for rank {absent}");
        let others = self.strangers + self.guests.len();
        if others > 0 {
            reason.push_str(&format!("; {others} connections did not show the job's token"));
        }
        reason
    }
}

/// Says why there is no group, to who can still hear it.
fn tell(stream: TcpStream, reason: &str) {
    if let Ok(mut channel) = Channel::new(stream) {
        // Small enough for the buffer of the socket: the time is for a peer that lets it fill.
        let _ = channel.send(&Message::new(Tag::Broken, 0).words(reason), Deadline::after(PAUSE * 50));
        channel.end();
    }
}

/// Rank 0: takes in the others, and tells all that all are there. Channels in the order of ranks.
pub(super) fn answer(
    listener: &TcpListener,
    token: &Token,
    world_size: usize,
    timeout: Duration,
) -> Result<Vec<Channel>> {
    listener.set_nonblocking(true).map_err(|e| super::failed("wait on", "a socket", &e))?;
    let members = (1..world_size).map(|_| None).collect();
    let mut door = Door { token, guests: vec![], members, strangers: 0 };
    let by = Deadline::after(timeout);
    while door.members.iter().any(Option::is_none) {
        let looked = door.look(listener);
        let looked = if looked.is_ok() && by.is_over() { Err(door.waited(timeout)) } else { looked };
        if let Err(reason) = looked {
            door.members.into_iter().flatten().for_each(|stream| tell(stream, &reason));
            return Err(error(reason));
        }
        std::thread::sleep(PAUSE);
    }
    welcome(door.members.into_iter().flatten().collect(), token, timeout)
}

fn welcome(members: Vec<TcpStream>, token: &Token, timeout: Duration) -> Result<Vec<Channel>> {
    let mut channels: Vec<Channel> = members
        .into_iter()
        .map(Channel::new)
        .collect::<std::io::Result<_>>()
        .map_err(|e| super::failed("set up", "a connection", &e))?;
    let (by, welcome) =
        (Deadline::after(timeout), Message::new(Tag::Done, 0).payload(token.rank0s().to_vec()));
    for rank in 1..=channels.len() {
        if let Err(e) = channels[rank - 1].send(&welcome, by) {
            let reason = format!("tcp-group: rank {rank} left before all had come ({e})");
            // Those welcomed already hear it in their first call.
            for channel in &mut channels {
                let _ = channel.send(&Message::new(Tag::Broken, 0).words(&reason), by);
            }
            return Err(error(reason));
        }
    }
    Ok(channels)
}

/// The other ranks: call rank 0 until it answers, and wait for it to say that all are there.
pub(super) fn call(
    address: &str,
    token: &Token,
    rank: usize,
    world_size: usize,
    timeout: Duration,
) -> Result<Channel> {
    let stream = super::wait_for(timeout, &format!("rank 0 at {address}"), |by| {
        let mut addresses = address.to_socket_addrs().ok()?;
        addresses.find_map(|address| TcpStream::connect_timeout(&address, by.left()?).ok())
    })?;
    let channel = Channel::new(stream).and_then(|mut channel| {
        channel.write(&hello(rank, world_size, token.callers()), Deadline::after(timeout))?;
        Ok(channel)
    });
    let mut channel = channel.map_err(|e| super::failed("greet", "rank 0", &e))?;
    // Rank 0 speaks last, after it has waited for everybody: its explanation should arrive.
    let heard = channel.receive(Token::LONGEST, Deadline::after(timeout.saturating_mul(2)));
    match heard {
        Ok(message) if message.tag == Tag::Done && equal(&message.payload, token.rank0s()) => Ok(channel),
        Ok(message) if message.tag == Tag::Broken => bail!("{}", message.text()),
        Ok(_) => bail!("tcp-group: whoever listens at {address} does not know the job's token"),
        Err(e) => bail!(
            "tcp-group: rank 0 at {address} did not welcome rank {rank} of {world_size} ({e}): \
             it waits for others, has another token, or is no rank 0"
        ),
    }
}
